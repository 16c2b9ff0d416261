"""Methods on top of the core, a file for each: its equations, their source, and functions of the core's types.

guidance         variants of classifier-free guidance: rescaled, CFG-Zero*, APG, CFG++
edm              EDM's preconditioning, as path, wrapper of the network, weight and times
meanflow         models that sample in one step, from the average velocity (MeanFlow, pixel MeanFlow)
distill          progressive and consistency distillation
asymflow         the velocity predicted in a low-rank subspace of each patch
edit             SDEdit, RePaint, inversion, samples given linear measurements (DPS)
windows          larger images than in training, by overlapping windows (MultiDiffusion)
flow_likelihood  log densities by the equation of the flow
ideal            the exact denoiser of a finite data set
spectrum         how much of an image a noised one leaves, frequency by frequency
"""
