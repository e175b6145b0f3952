"""What hardware is there and what it draws: inventory, energy meters, and models that stand in.

Invariant: everything here only reads. A meter's joules never go back within one
`epoch`, and a number that comes from a model says so in the meter's name.
"""
