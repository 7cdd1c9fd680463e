"""The operations in C++ (csrc/cpu), compiled for the machine."""
