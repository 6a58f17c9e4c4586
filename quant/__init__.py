"""Number formats: records, exact dequantisation, quantisers, error metrics."""
