/* The flag protocol of src/plan/flags.h and src/fabric/group.h, for exhaustive search with spin.
 *
 * N ranks make L launches. A cell stands for what a flag publishes (a bank of metadata, the rows of
 * a chunk, the partial sums of a chunk) and holds the launch that it was written for; TORN while it
 * is being written. The search covers every interleaving of the ranks, and every choice of launches
 * that a rank refuses.
 *
 * Claims: a read sees the launch that it is for, from its first byte to its last (asserts); every
 * rank gets to the end (no invalid end state): nothing is lost, and nobody waits for ever.
 *
 * Each rule of the protocol can be broken by a macro (-DDROP_CREDIT ...): the search must find it.
 */
#ifndef N
#define N 2
#endif
#ifndef L
#define L 4
#endif

#ifndef REFUSERS
#define REFUSERS N /* ranks 0 .. REFUSERS - 1 may refuse */
#endif

#define TORN 255
#define AT(a, b) ((a) * N + (b)) /* at rank a, from rank b */

#ifdef ONE_BANK
#define BANK(e) 0
#else
#define BANK(e) ((e) & 1)
#endif
#define IN_BANK(e, a, b) (BANK(e) * N * N + AT(a, b))

/* Is the flag up for launch e? */
#ifdef STALE_FLAG
#define IS_UP(flag, e) ((flag) != 0)
#else
#define IS_UP(flag, e) ((flag) == (e))
#endif

#ifdef DROP_CREDIT
#define HAS_CREDIT(p, e) skip
#elif defined(LATE_CREDIT)
#define HAS_CREDIT(p, e) (finished[AT(me, p)] + 3 >= (e))
#else
#define HAS_CREDIT(p, e) (finished[AT(me, p)] + 2 >= (e))
#endif

byte meta[2 * N * N], meta_ready[2 * N * N];
bool refusal[2 * N * N]; /* the header says so */
byte rows[N * N], push_flag[N * N];
byte partial[N * N], return_flag[N * N];
byte finished[N * N];
#ifdef TWO_IN_FLIGHT
byte launch_of[N];
#endif

/* One statement for each peer, in the order of the steps. */
#define PEER(step) ((me + step) % N)
#if N == 2
#define EACH_PEER(statement) statement(PEER(1))
#else
#define EACH_PEER(statement) statement(PEER(1)); statement(PEER(2))
#endif

inline send_metadata(p) {
#ifdef METADATA_FLAG_FIRST
  meta_ready[IN_BANK(e, p, me)] = e;
#endif
  meta[IN_BANK(e, p, me)] = TORN;
  atomic { meta[IN_BANK(e, p, me)] = e; refusal[IN_BANK(e, p, me)] = refuse }
#ifndef METADATA_FLAG_FIRST
  meta_ready[IN_BANK(e, p, me)] = e
#endif
}

inline take_metadata(p) {
  atomic {
    IS_UP(meta_ready[IN_BANK(e, me, p)], e);
    assert(meta[IN_BANK(e, me, p)] == e)
  }
  atomic {
    assert(meta[IN_BANK(e, me, p)] == e);
    refused = refused || refusal[IN_BANK(e, me, p)]
  }
}

inline push(p) {
#ifdef PUSH_FLAG_FIRST
  push_flag[AT(p, me)] = e;
#endif
  rows[AT(p, me)] = TORN;
  rows[AT(p, me)] = e;
#ifndef PUSH_FLAG_FIRST
  push_flag[AT(p, me)] = e
#endif
}

inline read_rows(p) {
  atomic {
#ifndef READ_WITHOUT_WAITING
    IS_UP(push_flag[AT(me, p)], e);
#endif
    assert(rows[AT(me, p)] == e)
  }
}

inline read_rows_again(p) { assert(rows[AT(me, p)] == e) }

inline give_back(p) {
#ifdef RETURN_FLAG_FIRST
  return_flag[AT(p, me)] = e;
#endif
  partial[AT(p, me)] = TORN;
  partial[AT(p, me)] = e;
#ifndef RETURN_FLAG_FIRST
  return_flag[AT(p, me)] = e
#endif
}

inline take_partial(p) {
  atomic {
#ifndef COMBINE_WITHOUT_WAITING
    IS_UP(return_flag[AT(me, p)], e);
#endif
    assert(partial[AT(me, p)] == e)
  }
}

inline read_partial(p) { assert(partial[AT(me, p)] == e) }
inline wait_for_credit(p) { HAS_CREDIT(p, e) }
inline give_credit(p) { finished[AT(p, me)] = e }

/* A launch whose metadata is there. The weight gradients read the rows once more, before or after
 * the combine: its threads may overtake each other. */
inline exchange() {
  if
  :: pushed -> pushed = false
  :: else -> EACH_PEER(push)
  fi;
  EACH_PEER(read_rows);
  EACH_PEER(give_back);
  if
  :: EACH_PEER(read_rows_again); EACH_PEER(take_partial)
  :: EACH_PEER(take_partial); EACH_PEER(read_rows_again)
  fi;
  EACH_PEER(read_partial)
}

proctype Rank(byte me) {
  byte e = 1;
  bool refuse, refused, pushed;

  do
  :: e > L -> break
  :: else ->
    atomic {
      if
      :: refuse = false
      :: me < REFUSERS -> refuse = true
      fi
#ifdef TWO_IN_FLIGHT
      launch_of[me] = e
#endif
    }
#ifdef CREDIT_BEFORE_READING
    EACH_PEER(give_credit);
#endif
    EACH_PEER(wait_for_credit);
    if
#ifdef SILENT_REFUSAL
    :: refuse -> skip
#endif
    :: else -> EACH_PEER(send_metadata)
    fi;
    if
    :: refuse -> skip /* a rank that refuses waits for nobody */
    :: else ->
#ifdef PUSH_BEFORE_METADATA
      EACH_PEER(push);
      pushed = true;
#endif
      EACH_PEER(take_metadata);
      if
      :: refused -> refused = false; pushed = false
      :: else -> exchange()
      fi
    fi;
    if
#ifdef NO_CREDIT_FROM_REFUSERS
    :: refuse -> skip
#endif
    :: else -> EACH_PEER(give_credit)
    fi;
    e++
  od
}

#ifdef TWO_IN_FLIGHT
/* No claim but its opposite: the search must find two launches in flight. */
active proctype Watch() {
end:
  atomic { launch_of[0] == launch_of[1] + 1 && launch_of[1] > 0 -> assert(false) }
}
#endif

init {
  atomic {
    run Rank(0);
    run Rank(1);
#if N == 3
    run Rank(2)
#endif
  }
}
