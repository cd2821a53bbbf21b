"""What an operator sees of a cluster from outside: its metrics, collected in the driver's process."""
