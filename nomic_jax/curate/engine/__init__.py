"""What cleaning, filtering and mining share: durable tasks, rows and texts by number, embedding, exact and
approximate search.
"""
