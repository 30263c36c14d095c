"""What prepare.py does: a module for each kind of data set, and what they share."""
