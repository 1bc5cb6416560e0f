"""What tools/doctor.py is made of: checks of a machine, each in a process of its own, and what they say."""
