"""What `prepare` runs on a host. It is sent there as text, so it has nothing around it: the standard library alone, and
Python 3.8 is enough. It tells raw facts and judges nothing.
"""
