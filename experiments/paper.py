"""What the DiT paper measured: the twelve models of its Table 4, after 400K steps."""

# Gflops of a forward pass (multiply-adds), parameters in millions, FID of 50,000 images
TABLE_4 = {"S/8": (0.36, 33, 153.60), "S/4": (1.41, 33, 100.41), "S/2": (6.06, 33, 68.40),
           "B/8": (1.42, 131, 122.74), "B/4": (5.56, 130, 68.38), "B/2": (23.01, 130, 43.47),
           "L/8": (5.01, 459, 118.87), "L/4": (19.70, 458, 45.64), "L/2": (80.71, 458, 23.33),
           "XL/8": (7.39, 676, 106.41), "XL/4": (29.05, 675, 43.01), "XL/2": (118.64, 675, 19.47)}
