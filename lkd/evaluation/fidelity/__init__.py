"""Do short rollouts rank losses as full trainings do?"""
