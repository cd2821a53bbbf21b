"""The gRPC face of a control plane: services, wire, watching. Decides nothing about experts."""
