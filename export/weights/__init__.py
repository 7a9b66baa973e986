"""How wide each weight is stored, the codes, and the way back from them."""
