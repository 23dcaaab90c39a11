"""Context teachers and classifiers: objects of a scene, hidden or visible."""
