"""Commands for conversion and measurement: `python tools/<name>.py`."""
