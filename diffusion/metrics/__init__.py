"""How good images are, in numbers: distances over features, feature networks, and a report of all numbers.

distances   pure functions over features [N, F]: Frechet and kernel distance, precision, recall, ...
features    networks that turn images into features, and what is expected of them
report      all numbers of one set of samples
"""
