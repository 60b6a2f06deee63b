"""``vitkernels verify``: numerics checked on the user's own machine, versions and model, by checks that can fail."""
