"""Capacity planning: how many of which GPUs, with which method, at what cost and accuracy.

``spec`` reads a plan file; ``steps`` prices an engine iteration from the cost model; ``bound``
answers in closed form; ``fleet`` simulates requests on replicas; ``search`` finds the fewest
replicas that meet the objectives; ``plan`` ranks what holds. numpy only.
"""
