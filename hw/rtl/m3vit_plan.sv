// The sequence of tiles: TILE_OUT outputs of one map for a block of an expert's tokens, through both maps of every expert
// that has tokens (next_tile of m3vit_engine_linear.h). A job is worked out while the one before is multiplied; `take`
// goes to the next. Blocks of a map are of one size, TOKEN_BLOCK at most.
module m3vit_plan #(
    parameter int TILE_OUT = 16,
    parameter int TOKEN_BLOCK = 32,  // a power of two
    parameter int MAX_EXPERTS = 16,
    localparam int EXPERT = $clog2(MAX_EXPERTS + 1)
) (
    input  logic              clk,
    input  logic              reset,
    input  logic              start_write,    // before a frame: where each expert's queue begins, and their end
    input  logic [EXPERT-1:0] start_expert,
    input  logic [      15:0] start_place,
    input  logic              start,
    input  logic [      15:0] experts,
    input  logic [      15:0] n_in,           // channels of the layer
    input  logic [      15:0] n_out,          // and hidden ones
    input  logic              take,
    output logic              valid,
    output logic              finished,
    output logic [EXPERT-1:0] expert,
    output logic              second,         // map
    output logic [      15:0] inputs,         // of the map
    output logic [      15:0] outputs,        // of the tile
    output logic [      15:0] row,            // its first
    output logic [      15:0] base,           // token of the expert, and of the queues
    output logic [      15:0] first,
    output logic [      15:0] count
);
    localparam int SHIFT = $clog2(TOKEN_BLOCK);
    localparam int BITS = SHIFT + 1;
    typedef enum logic [1:0] {
        IDLE,
        SEEK,
        DIVIDE,
        READY
    } state_t;
    state_t state;

    (* ram_style = "distributed" *) logic [15:0] starts[0:MAX_EXPERTS];
    logic [15:0] queue_at, queue_end, tokens, seen, blocks, block, rest, rows;
    logic [31:0] divided;  // above, what is left; below, the quotient
    logic [4:0] bit_;
    logic last_row, last_block;

    assign queue_end = starts[expert+1'b1];
    assign seen = queue_end - queue_at;
    assign blocks = (tokens + 16'(TOKEN_BLOCK - 1)) >> SHIFT;
    assign rows = second ? n_in : n_out;
    assign rest = rows - row;
    assign valid = state == READY;
    assign finished = state == IDLE;
    assign inputs = second ? n_out : n_in;
    assign outputs = rest < 16'(TILE_OUT) ? rest : 16'(TILE_OUT);
    assign first = queue_at + base;
    assign count = tokens - base < block ? tokens - base : block;
    assign last_row = rest <= 16'(TILE_OUT);
    assign last_block = tokens - base <= block;

    always_ff @(posedge clk) begin
        if (start_write) starts[start_expert] <= start_place;
        if (reset) state <= IDLE;
        else
            case (state)
                IDLE:
                if (start) begin
                    state <= SEEK;
                    expert <= 0;
                    queue_at <= 0;
                end
                SEEK: begin
                    second <= 0;
                    base <= 0;
                    row <= 0;
                    tokens <= seen;
                    block <= seen;
                    bit_ <= BITS + 1;
                    if (16'(expert) == experts) state <= IDLE;
                    else if (seen == 0) expert <= expert + 1;
                    else state <= seen > 16'(TOKEN_BLOCK) ? DIVIDE : READY;
                end
                DIVIDE: begin  // tokens over blocks, rounded up, which is TOKEN_BLOCK at most: a bit a cycle
                    bit_ <= bit_ - 1;
                    block <= divided[15:0];
                    if (bit_ == 0) state <= READY;
                end
                READY:
                if (take) begin
                    row <= last_row ? 0 : row + 16'(TILE_OUT);
                    if (last_row) begin
                        base <= last_block ? 0 : base + count;
                        if (last_block) begin
                            second <= !second;
                            if (second) begin
                                expert <= expert + 1;
                                queue_at <= queue_end;
                                state <= SEEK;
                            end
                        end
                    end
                end
            endcase
    end
    always_ff @(posedge clk) begin
        if (state == DIVIDE && bit_ == BITS + 1) divided <= {16'd0, tokens + blocks - 16'd1} << (16 - BITS);
        else if (divided[31:15] >= 17'(blocks)) divided <= {divided[30:15] - blocks, divided[14:0], 1'b1};
        else divided <= {divided[30:0], 1'b0};
    end
endmodule
