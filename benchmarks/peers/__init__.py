"""What each operator is compared with: one module an operator, for any device.

Each has `available(device, ...)`, the peers that run there by name, and `missing(device, ...)`, why
each of the others does not. Nothing is left out without a reason. Nothing heavy is imported before
it is asked for.
"""
