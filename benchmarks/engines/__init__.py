"""What benchmarks/engines.py is made of: peers and their environments, conversions, drivers, the table."""
