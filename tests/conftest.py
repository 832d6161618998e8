"""Shared by all tests."""

import signal

import torch

torch.set_num_threads(1)  # threads that share their cores with another process cost more than they gain
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what ends in &, and what that starts inherits
    signal.signal(signal.SIGINT, signal.default_int_handler)
