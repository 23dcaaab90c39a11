"""Use losses of other toolkits in kd, and losses of kd in other toolkits."""
