"""What will happen: every decision of a load, as frozen records, before a byte is read.

Pure: no I/O, no torch state.
"""
