"""How and where: Ray sessions and resources. Imports nothing of ours."""
