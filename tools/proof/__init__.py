"""What tools/prove_resume.py is made of: processes that are killed, and what is compared afterwards."""
