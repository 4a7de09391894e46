"""Raw frames as readers of calibrated, debayered rows; what their headers say; masters; frames on the sky."""
