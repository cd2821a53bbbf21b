"""What an operator sees of a serving process from outside: metrics; knows no request."""
