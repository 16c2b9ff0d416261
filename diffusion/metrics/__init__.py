"""How good images are, in numbers: distances over features, feature networks, and a report of all numbers.

distances    pure functions over features [N, F]: Frechet and kernel distance (FID, KID), nearest training image
moments      mean and covariance of features that arrive in batches, and the Frechet distance of two of them (FID, sFID)
neighbours   precision, recall, density, coverage
sliced       sliced Wasserstein distance (MIND)
scores       Inception score, kernel distance of subsets
patches      sliced distance of patches of pixels, which needs no feature network
seams        whether the grid of patches shows
intervals    how far a number can be trusted
references   files of statistics, as other programs write them
features     networks that turn images into features, and what is expected of them
report       all numbers of one set of samples, and the lines that print them
blocks       rows of features, checked, and their pairs a block at a time
"""
