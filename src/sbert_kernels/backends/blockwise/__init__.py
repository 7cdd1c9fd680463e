"""The operations in torch ops, a block of rows at a time: any device, any dtype."""
