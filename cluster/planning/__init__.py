"""The steps of a placement plan, pure functions of numbers; no Ray, torch, gRPC, clock or chance."""
