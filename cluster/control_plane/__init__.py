"""What decides: one controller, its operations, and the policies that act by themselves. Neither Ray nor torch."""
