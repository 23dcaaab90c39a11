"""Use context teachers: query regions, draw heat maps and rescore detections."""
