"""The gRPC face of an engine: admission, streaming, errors, health. Knows no torch, no Ray and no model."""
