"""``vitkernels verify``: check the numerics on the user's machine, versions and model, with checks that can fail."""
