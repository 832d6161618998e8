"""Keep one core busy until killed: python -m tests.programs.spin"""

while True:
    pass
