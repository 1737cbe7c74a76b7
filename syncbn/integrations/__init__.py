"""What some frameworks need beside ``syncbn.convert``: one module each, which imports its framework.

Nothing else imports them.
"""
