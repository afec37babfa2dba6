"""The method: squeezes, pictures, gates and the gated addition, with every control beside them."""
