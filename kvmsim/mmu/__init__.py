"""The secondary MMU: from guest frames to host frames, and how that stays true while pages come and go."""
