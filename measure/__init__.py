"""Runs the methods for real and observes what ``costmodel`` predicts, in the same words and units.

``runner.run_sweep`` measures points, each in a process of its own (``isolation``, ``worker``);
inside it ``observation`` builds a small decoder (``engine``) with the runnable twin of the method
(``methods``) and times it (``timing``). ``calibrate`` measures the device itself. Importing this
package, ``points``, ``store`` or ``runner`` does not import torch.
"""
