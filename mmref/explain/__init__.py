"""`mmref explain`: where in images a match lies, what references say, why refinement moved a result. Needs no Ray."""
