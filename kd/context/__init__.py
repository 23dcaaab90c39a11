"""Scene knowledge at work: queries about regions, heat maps and detector rescoring."""
