"""Two studies, each as a user would write it: settings, and what a run with them is made of."""
