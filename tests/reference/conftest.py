collect_ignore = ["record_apgd.py", "record_smallest.py", "record_square.py"]  # need the peers, which the tests do not
