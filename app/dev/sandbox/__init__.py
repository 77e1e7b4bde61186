"""A simulated Channel Manager in one process: NaviPartner's side of the webhook, for development and tests.

    python -m app.dev.sandbox --port 0 --seed 1 --settle-after 0.5

prints one line `{"url": "http://127.0.0.1:PORT", "pid": ..., "seed": ...}` when it listens. In Python use
`app.dev.sandbox.process.start()`. All data is in memory. Made-up ids and numbers, and the calls that a fault strikes,
depend on the seed and on the request, not on the order of concurrent calls; times are the clock's.

The behaviour is read from NaviPartner's public documentation and AL source and shares no code with our client: the
two are independent readings of the same facts.

Read it in this order: `channel_manager` (a call, from the path to the answer), `orders` (what becomes of an order),
`webhooks` (subscriptions and deliveries), `faults` (what goes wrong), `world` (what all of these share), `admin` (how a
test controls all this). `__main__` puts the parts together.

The Channel Manager: `/{tenant}/{environment}/{company}/channelManager...` and `.../webhook...`
-----------------------------------------------------------------------------------------------
Every address and every key (`x-np-api-key`) is accepted until a company is declared. The id of a company that is not
declared depends on its address: `GET /_sandbox/companies?tenant=&environment=&company=` returns it.

An order with a payment reference ends as Issued, one without as Draft. The item number of a line decides the rest:

    PKG...      a package: `componentSchedule`, a ticket for each component and one coupon in each wallet
    GRP...      a group ticket: one wallet for all
    CPN...      a coupon instead of a ticket
    FAIL...     issuing fails: the order ends as Error

The admin API: `/_sandbox/...`, JSON, no key; unknown fields are refused
-------------------------------------------------------------------------
GET, PATCH  settings      see `world.Settings`; PATCH takes a part of it
GET         companies     the company at an address: ?tenant=&environment=&company=
POST        companies     {id, name, tenant, environment, api_keys, forbidden_keys}; from the first one on, unknown
                          addresses and keys are refused
GET         faults        the rules, with how often each has struck
POST, PUT   faults        add one rule or a list (PUT: replace all rules); see `faults.Fault`
DELETE      faults, faults/{number}
GET, DELETE stats         calls per operation and status, 429s, active calls, most active and most waiting calls of
                          a key, pending and lost events, deliveries per status; DELETE resets them
GET         orders        one row per order: status, getOrder calls, those answered with a sound 200, settlements,
                          events fired, events acknowledged with 2xx; ?company_id=
POST        orders        make orders without createOrder; see `admin.Bulk`
POST        settle        {order_id, company_id, status}: set a status, as the back office can; no event
POST        fire          {order_id, company_id, times, timestamp}: send the event of an order; `"timestamp": "last"`
                          repeats the last one exactly
PATCH       subscriptions/{id}   {state}: "Disabled" or "Active"

Fault rules
-----------
`{"kind": "status", "operation": "getOrder", "status": 429, "retry_after": 2, "calls": 3}`. 404-then-200 is
`{"kind": "status", "operation": "getOrder", "status": 404, "first": 2}`.
"""
