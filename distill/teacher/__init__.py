"""What a teacher is and says: opened, paired with a student, running now or recorded."""
