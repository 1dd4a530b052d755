define b = Character(
"Bo"
