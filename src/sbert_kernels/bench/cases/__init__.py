"""The cases of each benchmark and the options of its command line: one subject a file, none of which imports torch."""

# Bytes of one number of each dtype that a case may name.
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
