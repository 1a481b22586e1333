#include "emulator/machine.h"

#include <cmath>
#include <numeric>
#include <utility>

namespace saw_int4::emulator {

Machine Machine::the_;

void fail(const Site& site, const std::string& what) {
  machine().stop(site, what);
}

std::string name_thread(int thread) {
  return text("thread ", thread, " (warp ", thread / kWarpSize, ", lane ", thread % kWarpSize, ")");
}

std::string name_lanes(uint32_t lanes) {
  std::string names;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    int last = lane;
    while (last + 1 < kWarpSize && (lanes >> (last + 1) & 1) != 0) ++last;
    names += text(names.empty() ? "" : ", ", lane, last > lane ? text("-", last) : "");
    lane = last;
  }
  return (lanes & (lanes - 1)) == 0 ? "lane " + names : "lanes " + names;
}

std::string name_site(const Site& site) {
  const std::string file = site.file_name();
  for (const char* root : {"csrc/", "tests/"}) {
    const size_t at = file.rfind(root);
    if (at != std::string::npos) return text(file.substr(at), ":", site.line());
  }
  return text(file, ":", site.line());
}

namespace {

bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

}  // namespace

void Machine::launch(const std::string& kernel, int grid, int block_threads, uint32_t shared_bytes,
                     std::function<void()> body, bool dependent) {
  if (grid <= 0 || block_threads <= 0 || block_threads > kMaxWarps * kWarpSize || block_threads % kWarpSize != 0 ||
      shared_bytes > options_.shared_bytes) {
    throw Error(text("launch of ", kernel, " with ", grid, " blocks of ", block_threads, " threads and ", shared_bytes,
                     " bytes of shared memory: expected at least 1 block, a multiple of 32 threads up to 1024, and "
                     "at most ",
                     options_.shared_bytes, " bytes"));
  }
  kernel_ = kernel;
  grid_ = grid;
  block_threads_ = block_threads;
  shared_bytes_ = shared_bytes;
  body_ = std::move(body);
  error_.clear();
  dependent_ = dependent;
  global_.begin_launch(dependent);
  random_.seed(options_.seed);

  std::vector<int> order(grid);
  std::iota(order.begin(), order.end(), 0);
  if (options_.order == BlockOrder::kDescending) std::reverse(order.begin(), order.end());
  if (options_.order == BlockOrder::kShuffled) std::shuffle(order.begin(), order.end(), random_);

  const int resident = std::clamp(options_.resident_blocks, 1, grid);
  while (static_cast<int>(blocks_.size()) < resident) blocks_.push_back(std::make_unique<Block>());
  for (int i = 0; i < resident; ++i) start(*blocks_[i], order[i]);
  int started = resident, finished = 0, warp = 0;
  while (finished < grid) {
    int slot = 0;
    if (resident > 1) {
      slot = static_cast<int>(random_() % resident);
      while (!blocks_[slot]->live) slot = (slot + 1) % resident;
      warp = static_cast<int>(random_() % blocks_[slot]->warps.size());
    }
    Block& block = *blocks_[slot];
    const bool ran = step(block, warp);
    if (!error_.empty()) throw Error(error_);
    if (ran) continue;
    if (!std::ranges::all_of(block.warps, [](const auto& w) { return w->exited == kAllLanes; })) {
      throw Error(text(kernel_, ", block ", block.index, ": ", describe_stall(block)));
    }
    ++finished;
    block.live = false;
    if (started < grid) start(block, order[started++]);
  }
}

void Machine::start(Block& block, int index) {
  block.index = index;
  block.live = true;
  block.warps_at_barrier = 0;
  block.warps_at_fours = 0;
  for (auto& operands : block.mma_operands) operands.clear();
  block.vote.fill(false);
  block.shared.reset(shared_bytes_);
  block.clocks.reset();
  const int num_warps = block_threads_ / kWarpSize;
  while (static_cast<int>(block.warps.size()) < num_warps) block.warps.push_back(std::make_unique<Warp>());
  block.warps.resize(num_warps);
  for (int w = 0; w < num_warps; ++w) {
    Warp& warp = *block.warps[w];
    warp.index = w;
    warp.ready = kAllLanes;
    warp.arrived = warp.exited = 0;
    warp.at_barrier = false;
  }
  while (static_cast<int>(block.threads.size()) < block_threads_) block.threads.push_back(std::make_unique<Thread>());
  for (int t = 0; t < block_threads_; ++t) {
    Thread& thread = *block.threads[t];
    thread.index = t;
    thread.lane = t % kWarpSize;
    thread.warp = block.warps[t / kWarpSize].get();
    thread.block = &block;
    thread.copies.clear();
    thread.groups.clear();
    thread.products.clear();
    thread.operands.clear();
    thread.product_groups = 0;
    thread.shared_mmas = 0;
    thread.launch_before_ended = !dependent_;
    thread.stack.prepare(thread.context, &Machine::run_thread);
  }
}

// Runs one warp until it waits or ends, the first that can from first_warp on. False: none can.
bool Machine::step(Block& block, int first_warp) {
  const int num_warps = static_cast<int>(block.warps.size());
  for (int i = 0; i < num_warps; ++i) {
    Warp& warp = *block.warps[(first_warp + i) % num_warps];
    if (warp.ready == 0) continue;
    const int lane = __builtin_ctz(warp.ready);
    warp.ready &= ~(1u << lane);
    current_ = block.threads[warp.index * kWarpSize + lane].get();
    switch_context(main_, current_->context);
    return true;
  }
  return false;
}

void Machine::run_thread() {
  Machine& self = machine();
  self.body_();
  self.exit_thread();
}

// Leaves the running thread where it stands for the next ready lane of its warp, or for the scheduler.
void Machine::park() {
  Thread& self = *current_;
  Warp& warp = *self.warp;
  if (warp.ready == 0) {
    switch_context(self.context, main_);
    return;
  }
  const uint32_t after = warp.ready & ~((2u << self.lane) - 1);
  const int lane = __builtin_ctz(after != 0 ? after : warp.ready);
  warp.ready &= ~(1u << lane);
  current_ = self.block->threads[warp.index * kWarpSize + lane].get();
  switch_context(self.context, current_->context);
}

void Machine::yield() {
  if (options_.resident_blocks <= 1) return;
  current_->warp->ready |= 1u << current_->lane;
  switch_context(current_->context, main_);
}

void Machine::stop(const Site& site, const std::string& what) {
  error_ = text(kernel_, ", block ", current_->block->index, ", ", name_thread(current_->index), ", ", name_site(site),
                ": ", what);
  Context abandoned;
  switch_context(abandoned, main_);
  __builtin_unreachable();
}

void Machine::check_exit(const Thread& thread) {
  const Warp& warp = *thread.warp;
  if (warp.arrived != 0) {
    stop(warp.site,
         text("thread exits with ", name_lanes(warp.arrived), " of its warp waiting here at ", warp.waits_at));
  }
  if (!thread.copies.empty()) {
    stop(thread.copies.front().site, "thread exits with a cp.async that was never waited for");
  }
  if (!thread.operands.empty()) {
    stop(thread.operands.front().site, "thread exits with a shared_mma that was never waited for");
  }
  if (!thread.launch_before_ended) stop(Site::current(), "thread exits without wait_for_launch_before");
}

void Machine::exit_thread() {
  Thread& self = *current_;
  check_exit(self);
  Warp& warp = *self.warp;
  warp.exited |= 1u << self.lane;
  if (warp.exited == kAllLanes && self.block->warps_at_barrier != 0) {
    stop(self.block->barrier_site, text("warp ", warp.index, " exits with other warps of its block waiting here"));
  }
  park();
  __builtin_unreachable();
}

void Machine::arrive(const char* what, const Site& site) {
  Thread& self = *current_;
  Warp& warp = *self.warp;
  if (warp.exited != 0) {
    stop(site, text("divergence: ", what, " by all lanes of the warp, after ", name_lanes(warp.exited), " exited"));
  }
  if (warp.arrived == 0) {
    warp.waits_at = what;
    warp.site = site;
  } else if (std::strcmp(warp.waits_at, what) != 0 || !same_site(warp.site, site)) {
    stop(site, text("divergence: lane ", self.lane, " is at ", what, ", with ", name_lanes(warp.arrived),
                    " waiting at ", warp.waits_at, " (", name_site(warp.site), ")"));
  }
  warp.arrived |= 1u << self.lane;
}

// The collective of the warp is complete: the running lane goes on, the others may.
void Machine::release(Warp& warp) {
  warp.arrived = 0;
  warp.at_barrier = false;
  warp.ready = kAllLanes;
  if (&warp == current_->warp) warp.ready &= ~(1u << current_->lane);
}

void Machine::warp_sync(const Site& site) {
  arrive("warp_sync", site);
  Warp& warp = *current_->warp;
  if (!last_to_arrive()) return park();
  if (!current_->block->clocks.join(1u << warp.index)) stop(site, "more barriers than the emulator can count");
  release(warp);
}

void Machine::block_sync(const Site& site) {
  arrive("block_sync", site);
  if (!last_to_arrive()) return park();
  Block& block = *current_->block;
  Warp& warp = *current_->warp;
  if (block.warps_at_barrier == 0) block.barrier_site = site;
  if (!same_site(block.barrier_site, site)) {
    stop(site, text("divergent barrier: warp ", warp.index, " is here, with other warps waiting at ",
                    name_site(block.barrier_site)));
  }
  for (const auto& other : block.warps) {
    if (other->exited == 0) continue;
    stop(site,
         text("divergent barrier: block_sync after ", name_lanes(other->exited), " of warp ", other->index, " exited"));
  }
  block.warps_at_barrier |= 1u << warp.index;
  warp.at_barrier = true;
  if (__builtin_popcount(block.warps_at_barrier) < static_cast<int>(block.warps.size())) return park();
  if (!block.clocks.join(block.warps_at_barrier)) stop(site, "more barriers than the emulator can count");
  block.warps_at_barrier = 0;
  for (const auto& other : block.warps) release(*other);
  yield();
}

bool Machine::four_warps_any(bool vote, const Site& site) {
  const char* const what = "a barrier of four warps";
  arrive(what, site);
  Block& block = *current_->block;
  Warp& warp = *current_->warp;
  const int four = warp.index / 4, first = 4 * four;
  const uint32_t all = 0xfu << first;
  if (first + 4 > static_cast<int>(block.warps.size())) stop(site, "four warps that the block does not have");
  block.vote[four] = block.vote[four] || vote;
  if (!last_to_arrive()) {
    park();
    return block.outcome[four];
  }
  if ((block.warps_at_fours & all) == 0) block.fours_site[four] = site;
  if (!same_site(block.fours_site[four], site)) {
    stop(site, text("divergent barrier: warp ", warp.index, " is here, with other warps waiting at ",
                    name_site(block.fours_site[four])));
  }
  block.warps_at_fours |= 1u << warp.index;
  warp.at_barrier = true;
  if ((block.warps_at_fours & all) != all) {
    park();
    return block.outcome[four];
  }
  if (!block.clocks.join(all)) stop(site, "more barriers than the emulator can count");
  block.warps_at_fours &= ~all;
  block.outcome[four] = std::exchange(block.vote[four], false);
  for (int i = first; i < first + 4; ++i) release(*block.warps[i]);
  const bool outcome = block.outcome[four];
  yield();
  return outcome;
}

std::string Machine::describe_stall(const Block& block) const {
  std::string what = "deadlock:";
  for (const auto& warp : block.warps) {
    what += text(" warp ", warp->index, ": ");
    if (warp->arrived == 0) {
      what += "exited;";
    } else {
      what += text(name_lanes(warp->arrived), " at ", warp->waits_at, " (", name_site(warp->site), ")");
      what += warp->at_barrier ? ", waiting for other warps;" : ";";
    }
  }
  return what;
}

void Machine::start_product(float* d, int n, const Site& site) {
  for (const Product& product : current_->products) {
    if (product.d == d) stop(site, "shared_mma_start of sums that are under way");
  }
  current_->products.push_back({d, {d, d + n}});
  std::fill(d, d + n, std::nanf(""));
}

std::vector<float>& Machine::product(const float* d, const Site& site) {
  for (Product& product : current_->products) {
    if (product.d == d) return product.sums;
  }
  stop(site, "shared_mma of sums without shared_mma_start");
}

void Machine::end_product(float* d, const Site& site) {
  if (!current_->operands.empty()) {
    stop(site,
         text("shared_mma_end before a shared_mma was waited for (", name_site(current_->operands.front().site), ")"));
  }
  std::ranges::copy(product(d, site), d);
  std::erase_if(current_->products, [&](const Product& product) { return product.d == d; });
}

void Machine::use_operands(const uint32_t* a, uint32_t b, const Site& site) {
  std::vector<uint32_t>& of_four = current_->block->mma_operands[current_->warp->index / 4];
  const size_t i = current_->shared_mmas++;
  if (i == of_four.size()) of_four.push_back(b);
  if (of_four[i] != b) {
    stop(site, text("shared_mma of different B in the lanes of four warps: byte ", b - SharedMemory::kBase, " here, ",
                    of_four[i] - SharedMemory::kBase, " elsewhere"));
  }
  current_->operands.push_back({a, {a[0], a[1], a[2], a[3]}, current_->product_groups, site});
}

void Machine::commit_products() {
  ++current_->product_groups;
}

void Machine::wait_for_products(int groups_left) {
  std::erase_if(current_->operands, [&](const Operands& in) {
    if (in.group >= current_->product_groups - groups_left) return false;
    if (!std::ranges::equal(in.values, std::array{in.a[0], in.a[1], in.a[2], in.a[3]})) {
      stop(in.site, "an operand of shared_mma changed before its wait");
    }
    return true;
  });
}

void Machine::issue_copy(const AsyncCopy& copy) {
  Thread& self = *current_;
  self.block->shared.begin_copy(copy.address, copy.bytes, self.index, self.block->clocks, copy.site);
  self.copies.push_back(copy);
}

void Machine::commit_copies() {
  Thread& self = *current_;
  const int committed = std::accumulate(self.groups.begin(), self.groups.end(), 0);
  self.groups.push_back(static_cast<int>(self.copies.size()) - committed);
}

void Machine::wait_for_copies(int groups_left, const Site& site) {
  Thread& self = *current_;
  const auto done = self.groups.begin() + std::max(0, static_cast<int>(self.groups.size()) - groups_left);
  const auto landed = self.copies.begin() + std::accumulate(self.groups.begin(), done, 0);
  for (auto copy = self.copies.begin(); copy != landed; ++copy) {
    if (copy->source != nullptr && std::memcmp(copy->data.data(), copy->source, copy->bytes) != 0) {
      stop(site, text("the source of a cp.async (", name_site(copy->site), ") changed before its wait"));
    }
    self.block->shared.land_copy(copy->address, copy->data.data(), copy->bytes, self.index, self.block->clocks);
  }
  self.copies.erase(self.copies.begin(), landed);
  self.groups.erase(self.groups.begin(), done);
}

}  // namespace saw_int4::emulator
