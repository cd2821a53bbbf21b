"""What computes: the processes that hold attention stages and experts. They decide nothing about the cluster."""
