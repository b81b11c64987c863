"""Sets a price with Django: `python django_write.py abc-123 109`."""

import os
import sys
from urllib.parse import urlsplit

import django
from django.conf import settings
from django.db import connection, models, transaction

url = urlsplit(os.environ["CACHEINVAL_DATABASE_URL"])
database = {"ENGINE": "django.db.backends.postgresql", "NAME": url.path[1:], "USER": url.username}
settings.configure(DATABASES={"default": {**database, "HOST": url.hostname, "PORT": url.port}})
django.setup()


class Price(models.Model):
    id = models.TextField(primary_key=True)
    price = models.IntegerField()

    class Meta:
        app_label = "shop"
        db_table = "prices"


def set_price(product_id: str, price: int) -> None:
    with transaction.atomic(), connection.cursor() as cursor:  # both or neither
        Price.objects.filter(id=product_id).update(price=price)
        cursor.execute(
            "SELECT cacheinval.invalidate(%s, namespace => %s)",
            [[f"price:{product_id}"], os.environ["CACHEINVAL_NAMESPACE"]],
        )


if __name__ == "__main__":
    set_price(sys.argv[1], int(sys.argv[2]))
