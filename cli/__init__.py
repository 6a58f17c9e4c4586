"""The `edgert` command: argv in, text out. See README.md in this folder."""
