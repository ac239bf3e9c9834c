collect_ignore = ["record_apgd.py"]  # needs the official AutoAttack code, which the tests do not
