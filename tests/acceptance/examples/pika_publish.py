"""Says with a plain AMQP client that a price has changed, wherever it is kept: `python pika_publish.py abc-123`."""

import json
import os
import sys

import pika

namespace, product_id = os.environ["CACHEINVAL_NAMESPACE"], sys.argv[1]
body = json.dumps({"v": 1, "kind": "invalidate", "keys": [f"price:{product_id}"]})
with pika.BlockingConnection(pika.URLParameters(os.environ["CACHEINVAL_BROKER_URL"])) as connection:
    channel = connection.channel()
    channel.confirm_delivery()  # raises where the broker did not take it: nothing else will tell anybody
    properties = pika.BasicProperties(content_type="application/json", type="cacheinval.v1", delivery_mode=2)
    channel.basic_publish(f"cacheinval.{namespace}", "", body.encode(), properties)
